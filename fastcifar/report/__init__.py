"""Runs explained: confusion, hard images, suspected label errors, curves, tables, and pages that show them."""
