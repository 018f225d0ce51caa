"""Sends what the user's steps return or keep from the ranks that ran them to the ranks that need it."""
