"""Local folders and object stores, and what is kept in them."""
