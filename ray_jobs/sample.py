"""Read the prompts, and sample the teacher and the student.

`ray job submit -- python ray_jobs/sample.py --config CONFIG [KEY=VALUE ...]`
"""

from _entry import main

if __name__ == "__main__":
    main("prepare", "sample")
