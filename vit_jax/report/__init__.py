"""Runs and experiments as one page: curves, tables, pictures of attention."""
