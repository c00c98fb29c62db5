"""The forms in which SAEs are stored: one module and one row of ``table.FORMATS`` for each."""
