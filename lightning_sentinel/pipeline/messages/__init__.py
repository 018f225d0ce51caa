"""Messages between the workers of a pipeline: headers, transport, and how a receiver handles a malformed message."""
