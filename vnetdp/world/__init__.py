"""Saved worlds: all of a stepped world as plain data, and its way back."""
