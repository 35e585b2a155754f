"""Furniture used by two or more rooms. No Lightning, no rooms, no data modules in here."""
