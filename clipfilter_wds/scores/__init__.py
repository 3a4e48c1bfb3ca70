"""Keeps scores in tables, and chooses samples by them."""
