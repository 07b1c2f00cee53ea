"""Thousands of slides: which they are (`plan`), one of them (`one_slide`), all (`engine`), what came out (`records`)."""
