"""What is made of the records: the page, tables, comparisons, other tools' files."""
