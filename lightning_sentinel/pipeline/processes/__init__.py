"""Processes: which machines may take part, which ranks they get, and who is named when one stops answering."""
