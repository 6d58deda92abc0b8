"""What `gpu_session.py` asks of a card: its steps, and the programs that they start."""
