"""Endpoints: where frames meet the outside."""
