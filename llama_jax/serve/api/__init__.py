"""The protocols of clients: JSON in, requests; deltas in, JSON out. No HTTP here."""
