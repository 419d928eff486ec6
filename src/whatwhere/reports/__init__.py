"""Explanations -> pictures, tables and pages."""
