"""What a run leaves on disk: in one file or in a part for each stage, and where another run goes on."""
