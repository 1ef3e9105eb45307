"""Tables and plots of what runs left on disk."""
