"""The README's commands do what it says, offline."""
