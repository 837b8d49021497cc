from hypothesis import settings

# A slow machine is no failure: deadlines would test the machine, not the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
