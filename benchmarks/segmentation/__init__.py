"""Segmentation against scale: what a user's masks lose at the wrong magnification, and what wsiscale wins back."""
