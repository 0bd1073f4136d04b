"""The accuracy study of docs/accuracy.md: its runs, its tables and its figures."""
