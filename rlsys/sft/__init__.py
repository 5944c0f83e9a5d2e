"""Supervised fine-tuning, `rlsys sft`: examples from files, the learner's own step, a Hugging Face directory at the end.

files --rows--> [ tokenize, mask ] --TrainSample, advantage 1--> learner/step.py with objective `likelihood` --> final_model/
"""
