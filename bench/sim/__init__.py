"""Simulates policies over many nodes, with the scans that routers call."""
