"""What attnc traces in place of library loops, and the table that says where."""
