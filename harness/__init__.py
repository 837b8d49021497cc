"""What train.py and the scripts share: one concern a file, and none of them imports train.py or a script."""

from harness.signals import end_quietly_on_ctrl_c

end_quietly_on_ctrl_c()
