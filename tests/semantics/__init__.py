"""What programs can notice of the shortcut: each row of docs/SEMANTICS.md is a test here."""
