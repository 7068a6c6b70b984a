"""What beat ticks: one module per schedule."""
