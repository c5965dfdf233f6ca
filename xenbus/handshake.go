package xenbus

// Next is the xenbus handshake: it returns the next step of the end that has this role.
// It is total: it has an answer for every combination of facts, whatever the peer, the
// toolstack or an earlier process left behind. If the caller writes the state that Next
// returned and the peer does not change, Next comes to Wait after a few steps.
//
// A frontend connects as Linux netfront does. If the backend is still in an earlier
// connection, the frontend first closes as the Windows driver does. A backend answers
// every state of a frontend as Linux netback does, by the shortest path that includes
// Closing.
func Next(role Role, f Facts) Step {
	// No peer uses the rings of an earlier generation any more.
	if f.attached() && f.Attached != f.Generation {
		return Step{Do: Release}
	}
	if role == Backend {
		if f.attached() {
			return f.backAttached()
		}
		return f.back()
	}
	if f.attached() {
		return f.frontAttached()
	}
	return f.front()
}

// unwritable returns the step of an end that may not or cannot write its state.
func (f *Facts) unwritable(otherwise Action) Step {
	if f.attached() {
		return Step{Do: Release}
	}
	return Step{Do: otherwise}
}

// become returns a step that writes state s, or waits if our state is s.
func (f *Facts) become(s State) Step {
	if f.Own == s {
		return Step{Do: Wait}
	}
	return Step{Wait, s}
}

// front returns the next step of a frontend that shares nothing with its backend.
func (f *Facts) front() Step {
	switch {
	case f.Lost:
		return Step{Do: Finish}
	case f.Leaving && (f.Gone || f.Own == Closed):
		return Step{Do: Finish}
	case f.Gone: // the toolstack may make the directory again
		return Step{Do: Wait}
	case f.Vanished && (f.Leaving || f.Own != Initialising):
		return f.become(Closed)
	case f.Vanished:
		return Step{Do: Wait}
	}
	switch f.Peer {
	case Initialised, Connected, Reconfiguring, Reconfigured:
		// The backend is in a connection we know nothing of: close it first.
		return f.become(Closing)
	case Closing:
		return f.become(Closed)
	case Closed:
		if f.Leaving || !f.Online {
			return f.become(Closed)
		}
	}
	switch {
	case f.Leaving:
		return f.become(Closed)
	case f.Peer == InitWait && f.Own == Initialising:
		return Step{Connect, Connected}
	}
	return f.become(Initialising)
}

// frontAttached returns the next step of a frontend whose rings the backend may be using.
func (f *Facts) frontAttached() Step {
	if f.Lost || f.Gone {
		return f.unwritable(Finish)
	}
	switch {
	case f.Vanished || f.Peer == Closed || f.Peer == Unknown:
		if f.Own == Closed {
			return Step{Do: Release}
		}
		return Step{Release, Closed}
	case f.Own == Closed: // the backend must reach Closed before we release the rings
		return Step{Do: Drain}
	case f.Peer == Closing:
		return Step{Drain, Closed}
	case f.Own == Closing:
		return Step{Do: Drain}
	case f.Own != Connected || f.Leaving || f.SawClosing:
		return Step{Drain, Closing}
	case isUp(f.Peer):
		return Step{Do: Run}
	}
	return Step{Do: Wait} // the backend has not connected yet, or was restarted and is about to adopt our rings
}

// back returns the next step of a backend that has no frontend memory mapped.
func (f *Facts) back() Step {
	if f.Lost || f.Gone {
		return f.unwritable(Finish)
	}
	if f.Leaving || !f.Online || f.Vanished {
		if f.Own == Closed {
			return Step{Do: Finish}
		}
		return f.toClosed()
	}
	switch f.Peer {
	case Closing:
		return f.become(Closing)
	case Closed:
		return f.toClosed()
	case InitWait, Reconfigured: // no frontend writes these states
		return f.become(Closing)
	case Initialising:
		return f.toInitWait()
	}
	// Unknown, Initialised, Connected, Reconfiguring
	switch f.Own {
	case Unknown, Initialising:
		return f.toInitWait()
	case InitWait:
		if f.Peer != Connected {
			return Step{Do: Wait}
		}
		if f.Hotplug {
			return Step{Connect, Connected}
		}
		return Step{Do: Connect}
	case Closing: // wait for the frontend to close
		return Step{Do: Wait}
	case Closed:
		if f.Peer == Connected {
			return f.toInitWait()
		}
		return Step{Do: Wait}
	}
	// An earlier backend process died in this state.
	if f.Adopt && f.Peer == Connected {
		return Step{Prepare, InitWait}
	}
	return Step{Wait, Closing}
}

// toClosed returns the next step from any state towards Closed.
func (f *Facts) toClosed() Step {
	switch f.Own {
	case Unknown, Initialising, Closing, Closed:
		return f.become(Closed)
	}
	return Step{Wait, Closing}
}

// toInitWait returns the next step from any state towards InitWait.
func (f *Facts) toInitWait() Step {
	switch f.Own {
	case Unknown, Initialising, Closed:
		return Step{Prepare, InitWait}
	case InitWait:
		return Step{Do: Wait}
	case Closing:
		return Step{Wait, Closed}
	}
	return Step{Wait, Closing}
}

// backAttached returns the next step of a backend that has the frontend's rings mapped.
func (f *Facts) backAttached() Step {
	if f.Lost || f.Gone {
		return f.unwritable(Finish)
	}
	switch f.Own {
	case Unknown, Initialising, Closed: // the directory was made again since we connected
		return Step{Do: Release}
	}
	if f.Vanished || (f.Peer != Initialised && f.Peer != Connected && f.Peer != Reconfiguring) {
		// The frontend has let the rings go, or should never have connected. Unmap before
		// we write Closing: the frontend may revoke its grants as soon as it sees
		// Closing.
		if f.Own == Closing {
			return Step{Do: Release}
		}
		return Step{Release, Closing}
	}
	switch {
	case f.Own == Closing: // wait for the frontend to close
		return Step{Do: Drain}
	case f.Leaving || !f.Online || f.Peer == Reconfiguring:
		return Step{Drain, Closing}
	case f.Own == Connected:
		return Step{Do: Run}
	case f.Own != InitWait:
		return Step{Drain, Closing}
	case f.Hotplug:
		return Step{Run, Connected}
	}
	return Step{Do: Wait} // attached, but the hotplug script has to finish before we may say Connected
}
