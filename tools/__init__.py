"""Development tools; none of this is in the wheel."""
