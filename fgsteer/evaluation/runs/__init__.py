"""Reading a benchmark run: its records, the settings chosen, tables, pictures, and the report."""
