"""What the studio's and a study's servers share: who is let in, and how much of whom is read, for how long."""
