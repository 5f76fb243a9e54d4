"""What is measured: each file prints a table and then one line of JSON."""
