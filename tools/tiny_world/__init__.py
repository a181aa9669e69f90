"""The tiny world: invented facts, simple versions of the eight tasks, and the models trained on them.

    python -m tools.tiny_world            # data, training, scores and model card of rect-tiny

world.py makes the facts, scenes.py and tasks.py the task rows, corpus.py the training documents, train.py the
model, evaluate.py the scores, build.py the files. Everything follows from the seeds in build.py.
"""
