"""What several hosts know of each other, how old it is, and what a bridge costs."""
