"""What train.py and the scripts share: one concern a file, and none of them imports train.py or a script."""
