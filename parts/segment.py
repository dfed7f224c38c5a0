"""What `segment` (B, S) of a batch says of each row: model.py writes it, data.py pads it with PAD and may turn frames
of AUDIO into PROMPT."""

PAD = 0  # nothing: padding on the right
TEXT = 1  # a text id, or a mark around the text
PROMPT = 2  # a frame that the model only reads, such as one of a voice prompt
AUDIO = 3  # a frame to predict: only these rows are targets
