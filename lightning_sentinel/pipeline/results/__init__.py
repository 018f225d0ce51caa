"""What the user's steps return or keep, brought from where they ran to the ranks that ask."""
