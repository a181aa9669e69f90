"""The tiny world: invented facts, eight miniature tasks, and the model `rect-tiny` trained on them.

    python -m tools.tiny_world            # everything: data, training, scores, model card

world.py makes the facts, scenes.py and tasks.py the task rows, corpus.py the training documents, train.py the
model, evaluate.py the scores, build.py the files. Everything follows from the seeds in build.py.
"""
