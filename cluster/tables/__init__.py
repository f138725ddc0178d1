"""Tables that grow part by part: captions, rephrased captions, and the gallery's index."""
