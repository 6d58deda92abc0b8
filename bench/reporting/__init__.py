"""What is made of recorded runs: tables, charts and pages."""
