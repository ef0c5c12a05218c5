"""What a request may ask for between the model's logits and a token, and the logprobs: numpy only.

A row belongs to one request, and what is done to it depends on that request alone.
"""
