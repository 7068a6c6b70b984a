"""What people and machines run: the stack, the tests, the command line."""
