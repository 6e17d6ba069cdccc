"""Where documents come from. Read in this order: documents, lines, text_files, json_files,
delimited, tables, hugging_face, names."""
