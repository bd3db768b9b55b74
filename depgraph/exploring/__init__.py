"""Curves, scans, pictures and pages to choose by."""
