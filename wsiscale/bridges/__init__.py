"""Stores as the objects of other libraries: one file a library, imported by those who have it."""
