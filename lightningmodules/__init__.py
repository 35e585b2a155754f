"""The methods, one folder each, and what two or more of them share."""
