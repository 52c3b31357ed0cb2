"""Where next-token scores come from. Nothing here samples."""
