"""The engine: which tokens are computed when. Called by the server through ``client``; calls the runner."""
