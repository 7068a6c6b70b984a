"""What each message does: one pure function per operation, one module per family of operations."""
