"""Processes: which machines may join the mesh, which ranks they get, and which rank is reported when one stops answering."""
