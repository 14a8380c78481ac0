"""Retrain one layer of a scanned network, prove what it did, and export the result."""
