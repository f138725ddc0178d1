"""Who is searched for among whom, in which order, and how good that order is."""
