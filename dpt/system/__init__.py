"""What any program needs of the machine: files that appear whole or not at all (`disk`), and how a command ends (`endings`)."""
